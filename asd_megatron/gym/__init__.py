"""Problem sets of the reasoning-gym package: its tasks, their streams of problems, their page."""
