"""What a chat answer is made of, whatever the API: text, reasoning and tool calls, read from what the model writes."""
