"""One thin module per DVC stage: read inputs, call the core, write outputs."""
