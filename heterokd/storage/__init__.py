"""Files of a workspace: studies, trials, object stores."""
