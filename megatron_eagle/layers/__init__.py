"""What transformer layers of base and draft are made of."""
