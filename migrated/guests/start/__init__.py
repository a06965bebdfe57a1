"""Starting the process of an incoming guest, apart from the agent: with its own user, cgroup and environment."""
