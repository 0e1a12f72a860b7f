"""Rules of others that move hints or prefixes by the success of rollouts, as controllers of the teacher's exposure.

There the hint stands in the student's own prompt, so that it changes the success which the rule hears at once. Here the
student sees nothing of the reference: a rule hears the plain success of its rollouts, and a ratio can show in it no
earlier than in the update after the one that it taught.
"""
