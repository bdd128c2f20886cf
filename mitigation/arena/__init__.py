"""The arena: training-free methods and their controls on the same questions, with what each costs."""
