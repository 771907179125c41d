"""What stands under each figure of the report."""

CAPTIONS = {
    "outcome": "Before and after, on the test split; bars are means over seeds, whiskers standard deviations.",
    "differences": "Difference to the one base model; bars are means over seeds, whiskers standard deviations.",
    "panel": "Alignment samples, class by class in turn, most masked attribution first; red raises the logit.",
    "curves": "Validation accuracy during alignment.",
    "entropy": "Output entropy of training samples with and without the spurious feature.",
    "embeddings": "Embeddings of test samples before and after alignment.",
}
