"""Language codes and tokenisation."""
