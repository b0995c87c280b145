"""The commands, one a file. Only click is imported at the top of each, so that `kogc --help` answers at once."""
