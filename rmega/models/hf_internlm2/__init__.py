"""Files that an InternLM2 export carries along; they need torch and transformers (4.44 to 5) and
nothing of rmega."""
