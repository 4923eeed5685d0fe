"""What the configuration says, as values: frozen, whole and checked.

Each option is declared once, as a field with its default and how it is read. The reader knows
nothing of single options.
"""
