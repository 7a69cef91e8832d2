-- Run once by the image, as its superuser. One role without special rights owns the databases, and everybody else uses it:
-- agnews holds the studies, mlflow the runs, mlflow_auth the accounts of an MLflow that asks for a password.
\getenv password POSTGRES_PASSWORD
CREATE ROLE agnews LOGIN PASSWORD :'password';
CREATE DATABASE agnews OWNER agnews;
CREATE DATABASE mlflow OWNER agnews;
CREATE DATABASE mlflow_auth OWNER agnews;
-- The image gave the superuser the same password. Without one, only who is inside the container gets in as superuser.
ALTER ROLE postgres PASSWORD NULL;
