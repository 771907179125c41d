"""Figures and the page that show what came out."""
