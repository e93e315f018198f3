"""The command line: parse, call, print. What is worth testing lives in the rooms below."""
