"""What a model is run on: text, chats, images, sound, loaders, read and checked for one model."""
