"""The commands: each parses its options, builds, calls the library and reports."""
