"""Performance targets, measured side by side; nothing here runs in the test suite."""
