"""Emulated engines: the twin's modelled replicas in real time, behind the OpenAI API."""
