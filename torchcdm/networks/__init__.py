"""Networks: ``(x (B, *shape), y (B,) or None) -> h``, all smooth and twice differentiable.

h is (B, T+2), or (B, classes, T+2) from a joint head. Every network has the attribute ``classes`` (the number of
classes or None; index ``classes`` is the null label, which ``y=None`` stands for), and a classifier ``joint``.
"""
