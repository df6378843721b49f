"""Other libraries' ways in: estimators of scikit-learn, modules of Lightning, tables of pandas, Arrow and Hugging Face."""
