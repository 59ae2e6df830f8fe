"""Ray's side of a sweep: a session of Ray, trials to Ray Tune, evaluation blocks to Ray tasks."""
