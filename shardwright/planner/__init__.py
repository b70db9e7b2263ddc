"""Reports and plans: what a run did, and later what a cluster would do (memory, time, cost) before it is rented.

Sits above `train`, whose real step the planner's dry run builds, and below `launcher`.
"""
