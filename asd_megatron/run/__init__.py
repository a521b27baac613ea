"""What both training programs share: the session, the lines of the RL loop, and the recipe's sections as objects."""
