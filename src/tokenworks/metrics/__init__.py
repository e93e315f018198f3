"""From outcomes to the measures of a run. Pure."""
