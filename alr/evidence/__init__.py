"""Evidence: suites of runs, their records, statistics, claims, figures and pages.  What the book is made from."""
