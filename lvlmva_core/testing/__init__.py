"""Conformance suites, public: what each kind of thing owes its caller, as a pytest base class to subclass.

Subclass the suite of the kind in a test module, override what it asks for, and let pytest collect it. docs/adding.md
has an example of each. Each suite is held to catch broken implementations by tests of its own.
"""
