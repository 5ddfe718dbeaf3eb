"""Many runs from one command: the plan, the list of jobs, a search's study, and the model that jobs share."""
