"""How people lay out data sets: each module finds one way, and says what each file is."""
