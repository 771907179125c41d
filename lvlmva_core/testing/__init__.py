"""Checks of what a user adds, as functions for a user's own tests."""
