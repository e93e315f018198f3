"""Who runs where, when, and on what promise. Pure: time is an argument, commands come back."""
