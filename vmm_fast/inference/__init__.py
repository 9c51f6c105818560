"""How a prior learns: the objective, the gradient step, the closed-form step, stick-breaking."""
