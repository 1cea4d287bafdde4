"""The sections of a report page, one a file."""
