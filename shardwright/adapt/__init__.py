"""What is done to a trained model beside training it on: parameter-efficient fine-tuning, pruning, quantisation."""
