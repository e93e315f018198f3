"""The chat page's tests."""
