"""One benchmark a file: where its problems come from, how they are asked and how they are judged."""
