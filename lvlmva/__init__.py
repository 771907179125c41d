"""What knows the project's folder, DVC and the terminal; below it stands `lvlmva_core`, above it the stages."""
