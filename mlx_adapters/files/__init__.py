"""Files: writing them whole, reading strangers' documents and weights, and locks."""
