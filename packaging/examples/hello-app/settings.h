/* What differs from customer to customer; build-app writes this file anew. */
#define APP_NAME "Hello"
#define APP_PACKAGE "com.example.hello"
#define APP_VERSION "0.0.0"
