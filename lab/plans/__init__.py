"""Plans for a budget: which timesteps, what each network call computes, and what is forecast."""
