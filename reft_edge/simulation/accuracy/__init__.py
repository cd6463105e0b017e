"""Accuracy against bytes: REFT beside FedAvg, FL-PQSU and central training, on one split of one data set."""
