"""The parts of both training programs: the session, the lines of the RL loop, and the recipe's sections as objects."""
