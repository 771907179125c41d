"""LVLM-VA: align small vision models with an expert's words (LVLM-VA, arXiv 2512.21985).

The library knows no DVC, no command line and no path of a project; every step is a function over arrays.
"""
