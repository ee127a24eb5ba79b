"""Programs that train an agent of another library, or of none, on the environment."""
