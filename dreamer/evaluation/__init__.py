"""Scores and reports: how good the dreams are (video.py), how good the agent is (agent.py), and a page to show both (report.py)."""
