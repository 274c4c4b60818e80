"""Files of other people's data sets, read by index: tables of rows, stores of pictures, records made of both."""
