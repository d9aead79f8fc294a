"""Problems answered and graded, and the files that say how well."""
