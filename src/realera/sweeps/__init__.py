"""Many runs from one command: their plan, the record of each job, a search's study, and the model they share."""
