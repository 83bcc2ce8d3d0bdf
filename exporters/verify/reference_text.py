"""Real text that every export is verified on, written for this project."""

TEXT = """\
Once upon a time there was a small fox named Ruby who lived at the edge of a quiet forest. Every \
morning she walked down to the river to drink and to look at the fish. One day the river was low, \
and the fish were gone. "Where did the water go?" Ruby asked the old heron. The heron pointed up \
the hill with his long beak. "The beavers built a dam," he said. "They did not know that anyone \
lived below." So Ruby ran up the hill. She found the beavers working hard, and she told them about \
the fish. The beavers were sorry. Together they opened a little gate in the dam, and the water ran \
down again. That evening, 27 fish swam past the heron's feet, and everyone was happy.

Engineers measure before they decide. A program that reads two numbers, adds them and prints the \
sum is easy to check; a network of a billion weights is not, unless two independent computations \
agree on the same text, token by token, from the first word to the last.
"""
