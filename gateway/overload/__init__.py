"""What a worker does before it would run out of something: it sheds the least important requests first."""
