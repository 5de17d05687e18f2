"""How wrong a hypergradient can be: certificates, the constants that they rest on, and their theorems."""
