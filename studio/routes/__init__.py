"""What the page may ask: uploads, masks and images (`inputs`), volumes (`jobs`), what came of them (`results`)."""
