"""Stories: what each command does, from first to last, on one screen."""
