"""Answers as pages: tables and charts in one HTML file that needs no network."""
