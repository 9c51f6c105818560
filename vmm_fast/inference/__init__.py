"""The learning of priors: objective, gradient step, closed-form step, stick-breaking weights."""
